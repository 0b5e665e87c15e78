"""Ray jobs over long videos: `mm-sglang job run`, or `run_job` and `Replica` from Python.

rank.py, leader.py    inside a replica: one SGLang rank each, and the process that asks them
replica.py            a replica seen from the driver: placed, started, watched, killed, started again
inputs.py, results.py what is asked, and the file of answers that a job is taken up from
run.py, job.py        what is checked first, and the job's loop
driver.py, service.py one gang for an event loop, and many of them behind Ray Serve
"""
