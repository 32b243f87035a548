"""What people run: the `mm` command and the demo."""
