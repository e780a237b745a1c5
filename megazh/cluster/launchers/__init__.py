"""Ways to start the ranks of a job; each module has one verb, `launch(job) -> exit code`."""
