"""A language model as the judge of pairs: what it is asked, how its answers are kept, what they come to."""
