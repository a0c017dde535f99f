NAME = "a module next to the script"


def fold(values):
    return sum(values)
