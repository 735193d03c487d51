"""Constants that more than one package needs. Each lives here once."""

import signal

# Target of a position that is not trained on (padding, a user's words, tool output).
IGNORE_INDEX = -1

# Exit code of a command that ends for a foreseeable mistake (wrong key, missing file, full disk).
EXIT_USER_ERROR = 2

# A signal that comes again so soon is the same one, on another way: a terminal or a launcher may deliver it twice.
SAME_SIGNAL_SECONDS = 0.5

# To a terminal, before a process ends that may have hidden its cursor.
SHOW_CURSOR = b"\x1b[?25h"

# The signals that ask a training to stop.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
