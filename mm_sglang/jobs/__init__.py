"""Ray jobs over long videos: `mm-sglang job run`, and from Python `run_job`, `start_replica` and `start_service`.

rank.py, leader.py    inside a replica: one SGLang rank each, and the process that asks them
replica.py            a replica seen from the driver: placed, started, watched, killed, started again
patience.py           how long each of that may take, and what ends it for good
inputs.py, results.py what is asked, and the file of answers that a job is taken up from
run.py, job.py        what is checked first, and the job's loop
driver.py, start.py   one gang for an event loop, and the call that starts it
service.py            many of them behind Ray Serve
"""
