"""Dataset formats: pure functions from a raw row to token ids. `base` holds what they share, `sft` finds one by its name.

A format is built once from a FormatSpec and a tokenizer, which is where a bad config shows (ConfigError), and then takes
rows one at a time; a row that it cannot use raises RowError and goes to quarantine.
"""
