"""The commands' modules. `app.cli` imports one of them only when its command runs.

To add a command, write a function here that takes the arguments after its name and returns an exit code or None, and
add a line to `COMMANDS` in `app/cli.py`.
"""
