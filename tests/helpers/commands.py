"""The command `score-sde`: in this process, and as a program for another one."""

from score_sde import cli


# of another process: its arguments are the command's
SCORE_SDE = "import sys; from score_sde.cli import main; main(sys.argv[1:])"


def score_sde(*arguments):
    """Run a command line here. Returns its exit status."""
    try:
        cli.main([str(each) for each in arguments])
    except SystemExit as end:
        return end.code or 0
