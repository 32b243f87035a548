"""Vision: safe reading of image files, tiling, and the image encoder."""
