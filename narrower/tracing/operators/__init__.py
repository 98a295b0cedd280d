"""What each ATen operator does to channel ids. `table` has a row for each; the rules stand beside it by kind."""
