"""What `near_duplicates.py` is made of: vectors of pictures, the search for similar ones, connected components."""
