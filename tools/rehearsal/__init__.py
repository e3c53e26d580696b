"""A stand-in for a card, on which `make gpu REHEARSE=1` runs what needs one; its numbers mean nothing."""
