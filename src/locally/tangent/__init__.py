"""Networks seen through their linearisation."""
