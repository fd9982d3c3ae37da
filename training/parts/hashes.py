"""What tells one value or file from another: SHA-256, as text."""

import hashlib
import json


def hash_of(value):
    """The hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_of_file(path):
    """The hash of what is in a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
