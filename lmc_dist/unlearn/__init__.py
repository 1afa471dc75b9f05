"""From a request to the corrected model: source, sweep, correction, apply, audit."""
