"""Ways to start the ranks of a job: `local` on this machine, others by `srun`, `deepspeed` or `mpirun`.

`choose` picks one. `supervisor` makes the ranks end together wherever they are; where another program starts them,
`remote` is the launcher's side, `guard` the rank's side, and `lifeline` what they say to each other. `rank_log` reads
the log of a rank.
"""
