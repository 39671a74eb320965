"""The command line as a process: the script `dualfocus`, and ``python -m dualfocus``."""

# what `signal` is made of: to import its enums takes most of the time in which Ctrl-C is still a traceback
import _signal as signal  # type: ignore[import-not-found]
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, also while it is still being imported."""
    interrupts = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not under nohup, for one
    if interrupts:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: nothing has begun
    from dualfocus import cli

    try:
        if interrupts:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if interrupts:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor while Python ends


if __name__ == "__main__":
    main()
