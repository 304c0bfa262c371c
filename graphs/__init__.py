"""What is captured and how: the decode step, its static buffers, buckets, capture and proofs."""
