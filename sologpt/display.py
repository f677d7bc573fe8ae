"""
How scripts show times and lines; imports nothing heavy.
"""


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def print_aligned(lines):
    """Prints lines of the form `name: text` with their texts one below another."""
    for line in lines:
        name, _, text = line.partition(": ")
        print(f"{name + ':':<11} {text}")
