def write_report(rows, out):
    pass
