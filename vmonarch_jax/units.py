"""Numbers as they are read."""


def bytes_text(count: int) -> str:
    """Bytes in the unit in which they are neither 0.0 nor thousands.

    Example:
        >>> bytes_text(96), bytes_text(1536), bytes_text(96 * 2**20), bytes_text(10 * 2**30)
        ('96 bytes', '1.5 KiB', '96.0 MiB', '10.00 GiB')
    """
    # half of the last digit that is shown: 1023.96 KiB reads better as 1.0 MiB
    if count < 1024:
        return f"{count} byte{'s' * (count != 1)}"
    if count < 1023.95 * 2**10:
        return f"{count / 2**10:.1f} KiB"
    if count < 1023.95 * 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**30:.2f} GiB"
