"""Data: from files to minibatches. Import from the modules; this file stays light on purpose."""
