"""The command line: the only room that knows Typer, terminals and exit codes."""
