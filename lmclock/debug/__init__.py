"""Looking inside a program while it runs: `diff` holds two machines against each other."""
