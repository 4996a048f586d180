"""The `herd` command: one small file per verb. Exit codes: 0 done, 1 failed, 2 user error, 130 interrupted."""
