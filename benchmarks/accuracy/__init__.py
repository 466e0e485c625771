"""What the units add, and the networks people use beside ours: ``make accuracy``, or ``python -m benchmarks.accuracy``.

One loop trains every variant for as many steps on the same subjects; for one seed all see the same crops in the same
order, and what a variant shares with the backbone starts with the backbone's weights. The small setting serves to
compare variants, not to reach the shipped model's figures. Subjects are synthetic and say nothing of patients.
"""
