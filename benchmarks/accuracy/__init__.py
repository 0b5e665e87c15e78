"""What sparse prefill does to a trained model's answers: `python -m benchmarks.accuracy`."""
