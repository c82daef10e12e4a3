"""Studies that are ready to run, and the programs that make what they start from; imported as `tutelage.studies`.

`tutelage study plan micro` finds `micro.yaml` here by its name. May import the services; none imports this.
"""
