from tests.numerics.compare import COMPARED


def pytest_terminal_summary(terminalreporter):
    """How close the layouts are, on the last lines of every session that compared some."""
    for group, found in COMPARED.items():
        name, (size, what) = max(found.items(), key=lambda item: item[1])
        terminalreporter.write_line(f"parity, {group}: worst of {len(found)} is {size:.1e}, {what}, in {name}")
