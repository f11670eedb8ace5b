"""From texts to vectors: what a call asks for, its tokens, its batches, its vectors.

Images become the same token sequences in the room of images, and go through the same batches.
"""
