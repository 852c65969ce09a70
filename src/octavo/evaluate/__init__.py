"""How good the pictures are: the checker that reads the embedded model's pictures, and the prompts it is asked."""
