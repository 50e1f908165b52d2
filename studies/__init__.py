"""What to run and what it meant: specs, search spaces, studies, curves, reports, the command."""
