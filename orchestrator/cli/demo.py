"""placeholder"""
def demo() -> None:
    pass
