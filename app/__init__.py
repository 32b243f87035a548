"""The `mm` command: `cli.py` has the table of commands, `commands/` one module per group of them."""
