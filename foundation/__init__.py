"""What every package may use: the class of users' mistakes, logging, file hashes, optional extras, the HTML scaffold."""
