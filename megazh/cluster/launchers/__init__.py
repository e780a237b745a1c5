"""Ways to start the ranks of a job: `local` on this machine, `srun` in a Slurm job, `hosts` by DeepSpeed's launcher.

`choose` picks one. `supervisor` makes the ranks end together wherever they are; where another program starts them,
`remote` is the launcher's side, `guard` the rank's side, and `lifeline` what they say to each other. `rank_log` reads
the log of a rank.
"""
