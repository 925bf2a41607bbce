"""Many trainings, resumably, on one machine or many: jobs of a file handed to local processes, Slurm or Ray."""
