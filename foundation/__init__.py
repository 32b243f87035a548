"""What every package may use: the class of users' mistakes, logging, hashes, optional extras, the HTML scaffold."""
