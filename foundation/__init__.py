"""What every package stands on: users' mistakes, weights-file hashes, optional extras, the HTML scaffold."""
