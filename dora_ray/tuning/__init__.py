"""Many runs that answer one question (Ray Tune), and the pages that show what runs and sweeps did."""
