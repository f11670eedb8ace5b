"""Other runtimes on the same merged model: each set up as its authors advise, one file each."""
