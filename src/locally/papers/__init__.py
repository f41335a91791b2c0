"""The page's papers: a card (TOML) and an experiment (Python) of one stem each."""
