"""Training: the embedded model from pictures that the code draws itself (`demo`), and the loop it runs in."""
