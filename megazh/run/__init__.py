"""What a run leaves behind: its folder, metrics, plot and closing summary. Imports no engine."""
