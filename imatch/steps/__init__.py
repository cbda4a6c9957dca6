"""The verbs and their loops, one file a notebook: embed, make references, index and search, match.

Each verb works on a started `runs.Step`, does what is missing in its folder and returns what is there in the
end. `start_*` says what the step is (everything that changes the result); the verb's own arguments say how it
is worked through and change no byte.
"""
