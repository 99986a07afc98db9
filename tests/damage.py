"""What a bad disk does to a file."""

from pathlib import Path

DAMAGES = ("emptied", "cut", "flipped")


def damage(path: Path, how: str) -> None:
    """Empties a file, cuts it in half, or flips a bit in the middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "flipped":
        content[middle] ^= 1
    else:
        del content[0 if how == "emptied" else middle :]
    path.write_bytes(content)
