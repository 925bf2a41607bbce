"""Runs of the tests are signed with a key of their own, not with the developer's."""

import os
import tempfile

os.environ["LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="rlopt-tests-")
