"""Ways to start the ranks of a job: `local` on this machine, `hosts` on several.

Each has `launch(job)`, which returns an exit code, and `command(job)`, the words that a dry run shows. `rank_log` reads
the log of a rank.
"""
