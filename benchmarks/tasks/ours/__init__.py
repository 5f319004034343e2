"""m6rec in this benchmark: a backbone for each dataset, answering by itself or tuned for the task."""
