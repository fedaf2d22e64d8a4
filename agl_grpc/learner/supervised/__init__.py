"""Learners of the same samples without a policy gradient: supervised fine-tuning and best-of-n."""
