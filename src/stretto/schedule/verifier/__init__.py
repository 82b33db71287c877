"""The rules that a schedule is held to, one file each; ``schedule.validate`` runs them in turn."""
