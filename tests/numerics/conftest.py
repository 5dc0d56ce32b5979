from tests.numerics.compare import COMPARED


def pytest_terminal_summary(terminalreporter):
    """Prints the largest difference of each group of comparisons at the end of the session."""
    for group, found in COMPARED.items():
        name, (size, what) = max(found.items(), key=lambda item: item[1])
        terminalreporter.write_line(f"parity, {group}: worst of {len(found)} is {size:.1e}, {what}, in {name}")
