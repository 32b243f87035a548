"""Speech: sound files, features, encoders, and the adapter that gives the language model its input rows."""
